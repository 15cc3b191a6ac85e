import sys
from pathlib import Path

# The fake trainer is imported by name in worker processes, which inherit this path.
sys.path.insert(0, str(Path(__file__).parent))
