"""Campaigns about what surrounds the figures: damaged files, processes killed, shapes and threads that come and go."""
