"""Code shared by the public modules. Nothing here is part of the public API."""
