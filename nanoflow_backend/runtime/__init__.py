"""Programs: a schedule compiled for a device."""
