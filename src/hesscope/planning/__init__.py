"""What a computation will take, before anything heavy is run."""

from hesscope.planning.cluster import ClusterPlan, plan_cluster
from hesscope.planning.plan import OPERATORS, WHAT, plan
from hesscope.planning.skeleton import skeleton_problem

__all__ = ["OPERATORS", "WHAT", "ClusterPlan", "plan", "plan_cluster", "skeleton_problem"]
