"""Models: loading them, their cards, and the data of the embedded ones."""

import warnings

# transformers imports tqdm, which asks for ipywidgets in a notebook; its bars are not shown.
warnings.filterwarnings("ignore", message="IProgress not found")
