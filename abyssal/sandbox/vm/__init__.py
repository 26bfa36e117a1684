"""Virtual machines by QEMU: guest kernel, disks, machine, monitor, memory snapshots."""
