"""The demo: two teachers and their students on handwritten digits."""
