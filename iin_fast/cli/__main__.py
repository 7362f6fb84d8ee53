"""python -m iin_fast.cli"""

from . import main

main()
