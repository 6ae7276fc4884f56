from storage.errors import DamageError as DamageError
from storage.errors import IdentityError as IdentityError
from storage.errors import UserError as UserError
from storage.progress import Progress as Progress
from storage.shards.pack import pack as pack
from storage.store.store import Store as Store
from storage.views.policy import Policy as Policy
from storage.views.policy import policy as policy

__version__: str
