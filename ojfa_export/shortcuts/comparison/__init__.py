"""Every kind of shortcut on one checkpoint, side by side: `ojfa-export compare`."""
