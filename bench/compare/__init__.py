"""Candidates beside one another at equal time, their lines on disk, and the pages made of them."""
