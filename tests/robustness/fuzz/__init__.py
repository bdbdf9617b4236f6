"""Every reader of files and flags, given what no writer wrote: it refuses, and runs nothing."""
