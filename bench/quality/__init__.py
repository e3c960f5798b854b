"""What the exits, policies and drafts give, and what they cost."""
