"""What the public modules share. Nothing here is part of the public face."""
