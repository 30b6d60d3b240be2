"""One of several processes, which live; the last one `fails` or `is silent` where it is told to."""

import sys
import time

from instar.sharding.peers import Peers, call_roll
from instar.sharding.places import find_place


def main(fate: str) -> None:
    place = find_place()
    lines, hosts = call_roll(place, 200)
    last = place.number == place.count - 1
    if last and fate == "is silent":
        while lines[0].receive() is not None:  # until process 0 has ended
            pass
        return
    watching = Peers(place, lines, hosts, silence=1 if fate == "is silent" else 100)
    if last:
        watching.end(7, "it failed")
    time.sleep(200)


if __name__ == "__main__":
    main(sys.argv[1])
