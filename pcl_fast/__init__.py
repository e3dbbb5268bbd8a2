"""Prototypical Contrastive Learning, trained as fast as the hardware allows."""

from pcl_fast.garbage import wait_for_imports
from pcl_fast.interrupts import end_quietly
from pcl_fast.threads import wait_asleep
from pcl_fast.user import give_name_and_home

# Before anything else is imported.
end_quietly()
wait_for_imports()
wait_asleep()
give_name_and_home()
