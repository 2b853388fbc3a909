"""What operators know: one room per question, one file per family of ops."""
