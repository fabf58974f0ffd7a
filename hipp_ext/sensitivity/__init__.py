"""What removing units of a group does to the model's output."""
