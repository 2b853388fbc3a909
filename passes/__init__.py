"""What the compiler does: each file is one stage, named for its verb."""
