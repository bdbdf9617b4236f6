from .config import ClusterConfig as ClusterConfig
from .run_status import status as status
from .submission import submit as submit
