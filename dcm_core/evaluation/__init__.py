"""How good experts are: measures against a reference, the report of them, its picture, and a search for better settings."""
