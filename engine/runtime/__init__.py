"""The step graph, the runners that execute it, and the gate each must pass. Never imports export."""
