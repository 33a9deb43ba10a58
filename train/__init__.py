"""Learning schedules for a frozen model: SDT, IEPO and the L2C baseline."""
