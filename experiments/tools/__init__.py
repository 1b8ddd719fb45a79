"""What a network holds: before any weight is made, and after it was saved."""
