/* One team of threads for everything. Its members share the work of a phase by drawing numbers, so that one that the
   system delays holds nobody up, and meet between phases by spinning: a token has hundreds of phases of microseconds.
   Between calls they sleep; those that a call has no use for go back to sleep. */

typedef struct Team Team;
typedef void (*Job)(Team *team, int member, void *argument);

struct Team {
    int size;    /* members that take part from the next call on, whoever calls included */
    int members; /* there are so many */
    int called;  /* took part in the last call that woke any */
    pid_t owner;
    pthread_mutex_t lock;
    pthread_cond_t call;
    unsigned calls;
    Job job;
    void *argument;
    atomic_uint phase;
    atomic_int arrived;
    atomic_long next;
};

enum { SPINS = 2000 }; /* then the processor is offered to others: there may be fewer cores than threads */

static inline void meet(Team *team)
{
    unsigned phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    int size = team->size; /* once the last has arrived it may change */
    if (atomic_fetch_add(&team->arrived, 1) + 1 == size) {
        atomic_store(&team->arrived, 0);
        atomic_store(&team->next, 0);
        atomic_store_explicit(&team->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->phase, memory_order_acquire) == phase; spins++) {
        if (spins < SPINS) __builtin_ia32_pause();
        else sched_yield();
    }
}

/* The number of the next piece of work of this phase; the phase ends with `meet`. */
static inline long draw(Team *team) { return atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed); }

typedef struct { Team *team; int member; unsigned seen; } Membership;

static inline void *serve(void *given)
{
    Membership own = *(Membership *)given;
    free(given);
    for (;;) {
        pthread_mutex_lock(&own.team->lock);
        while (own.team->calls == own.seen) pthread_cond_wait(&own.team->call, &own.team->lock);
        own.seen = own.team->calls;
        int called = own.member < own.team->called;
        pthread_mutex_unlock(&own.team->lock);
        if (!called) continue;
        own.team->job(own.team, own.member, own.team->argument);
        meet(own.team);
    }
    return NULL;
}

/* A team of whoever calls, for as long as the process lasts; NULL if there is no memory. */
static inline Team *new_team(void)
{
    Team *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    team->size = team->members = 1;
    team->owner = getpid();
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->call, NULL);
    return team;
}

/* Let so many take part from the next call on; 0 if the system gives them. Nobody is ever sent away. */
static inline int resize(Team *team, int size)
{
    for (; team->members < size; team->members++) {
        Membership *own = malloc(sizeof *own);
        pthread_t thread;
        if (!own) return -1;
        *own = (Membership){team, team->members, team->calls};
        if (pthread_create(&thread, NULL, serve, own)) return free(own), -1;
        pthread_detach(thread);
    }
    team->size = size;
    return 0;
}

/* Let every member do the job; returns when all have. */
static inline void work(Team *team, Job job, void *argument)
{
    if (team->size > 1) {
        pthread_mutex_lock(&team->lock);
        team->job = job;
        team->argument = argument;
        team->called = team->size;
        team->calls++;
        pthread_cond_broadcast(&team->call);
        pthread_mutex_unlock(&team->lock);
    }
    job(team, 0, argument);
    meet(team);
}
