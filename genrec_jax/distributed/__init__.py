"""One trial on several devices."""
