"""What a program asks of the operating system: files, locks, memory, exit codes."""
