"""python -m rlsys"""

from actors.cli import main

main()
