"""What one candidate costs and what its images are worth."""
