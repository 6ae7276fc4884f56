"""Views: from a policy's line to the uint8 image that teacher and student both see."""
