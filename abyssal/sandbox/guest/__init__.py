"""What runs inside a sandbox: one static C program, and how it is built."""
