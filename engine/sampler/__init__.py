"""Plans (the table every solver is), noise streams, and the tick that advances a batch of slots."""
