"""What this host offers to engines: control groups, mounts, system call filters."""
