"""`ephemera reproduce`: the papers' tables and figures, each from one recipe, through the commands that users have."""
