"""What `pipeline evaluate` prints and draws, one file for each thing that it measures."""
