"""Tools that inspect a network: before its weights are made, and after it was saved."""
