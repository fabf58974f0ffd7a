"""What removing units of a group does to what the model puts out."""
