"""The PostgreSQL adapter: the jobs of a root in the tables of one schema, on a server or several that act as one."""
