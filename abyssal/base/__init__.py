"""Ground that every room stands on: errors, files, progress, machine facts."""
