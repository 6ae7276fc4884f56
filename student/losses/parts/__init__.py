"""Parts that several losses share: projectors, queues and links."""
