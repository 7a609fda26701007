"""What everything else stands on: errors, records, progress, devices, timing."""
