"""One of several processes, of which the last `fails`, or lives and `is silent`."""

import sys
import time

from instar.sharding.peers import Peers, call_roll
from instar.sharding.places import find_place


def main(fate: str) -> None:
    place = find_place()
    lines, hosts = call_roll(place, 60)
    last = place.number == place.count - 1
    if last and fate == "is silent":
        time.sleep(5)
        return
    watching = Peers(place, lines, hosts, silence=1)
    if last:
        watching.end(7, "it failed")
    time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1])
