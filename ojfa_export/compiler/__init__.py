"""The compiler: checkpoint in, verified bundle out, one resumable stage after the other."""
