"""The trajectory log: every operation of a sandbox and its result, in one order, durable, evident when changed."""
