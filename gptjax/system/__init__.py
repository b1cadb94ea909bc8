"""The operating system: files, locks, memory, exit codes."""
