"""Many requests in one batch: samples join and leave between ticks, whatever their feature, lambda, solver, steps and seed."""
