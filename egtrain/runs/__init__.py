"""What `egtrain runs` shows: runs read from their files, grouped over seeds, as a table."""
