"""What finished runs show."""
