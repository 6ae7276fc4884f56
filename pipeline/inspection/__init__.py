"""What `pipeline inspect` and `pipeline teachers` show."""
