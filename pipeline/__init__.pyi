from pipeline.cli import main as main
from pipeline.recipes.loader import load_recipe as load_recipe

__version__: str
