"""What robustness.py does to a teacher cache: flips bytes, kills captures, fills disks; each on a real toy run."""
