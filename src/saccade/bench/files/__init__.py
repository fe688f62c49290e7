"""What reading, checking and converting files costs."""
