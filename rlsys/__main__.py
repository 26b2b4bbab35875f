"""python -m rlsys"""

from rlsys.cli import main

main()
