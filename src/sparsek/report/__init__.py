"""Records as tables and pictures."""
