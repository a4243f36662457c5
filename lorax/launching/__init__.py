"""One sweep on many machines: its parts, the worker that trains one, engines that start workers."""
